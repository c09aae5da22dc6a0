"""How good few steps and mixtures are: tables of pictures, judged."""
