"""What dropping costs: perplexity of a plan on a text."""

from pyruntime.evaluate.perplexity import Perplexity, perplexity, windows

__all__ = ["Perplexity", "perplexity", "windows"]
