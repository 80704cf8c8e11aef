"""A saved model on the Hub: its card, and one commit of what others need."""
