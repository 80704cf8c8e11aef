"""A saved model on the Hub: its card, and one commit of what others need."""

from .push import push_folder


__all__ = ["push_folder"]
