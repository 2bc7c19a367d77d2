"""How good is a likeness that is predicted and not trained? See README.md."""
