"""Value methods: what numbers the kept weights may be. One file a method; ``contract.py`` says what one is."""
