"""Who owns a parameter, and what of it is here."""
