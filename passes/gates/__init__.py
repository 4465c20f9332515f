"""Gates: which activations become zero at run time. One file a method; ``contract.py`` says what one is."""
