"""What is measured beside the toy benchmark of eval.py: real videos, the papers' claims, speed.
May import all but eval.py, which hands it what it needs of its own."""
