"""Attacks on a trained expert: does it give away its training text?"""
