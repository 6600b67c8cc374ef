"""Numerics that two or more methods share."""
