"""Runs ML programs with torch, on any machine."""
