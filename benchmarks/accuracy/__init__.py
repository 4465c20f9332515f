"""``make accuracy``: what each method costs on a language model and an encoder, and which relations of papers hold.

``grid`` names the rows, ``fixture`` loads and judges a model, ``run`` measures row by row into JSON lines and resumes,
``relations`` compares rows window by window, ``report`` writes accuracy.md and accuracy.json.
"""
