"""Adapters to other packages, each an optional extra and imported only when it is asked for."""
