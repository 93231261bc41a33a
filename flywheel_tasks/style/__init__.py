"""Stylistic artifacts (Sec. 2.4.4): features of responses, a linter over text (Sec. 3.5.6), and drift statistics."""
