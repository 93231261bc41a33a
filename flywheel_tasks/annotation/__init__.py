"""Annotation (Sec. 2.2.2): pairs of responses, what leaves the house for people to judge, and what comes back."""
