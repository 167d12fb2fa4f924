"""Ranking by Phi-3 Vision on this machine."""
