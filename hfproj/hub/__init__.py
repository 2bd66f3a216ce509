"""Sharing adapters: their cards, and loading them from a folder or the Hub."""
