"""Release: promotion, A/B exposure and the readout (Sec. 2.5.2)."""
