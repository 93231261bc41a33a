"""Statistics of the online evaluation (Sec. 2.5.2, Appendix 6): pure functions, no I/O."""
