"""What a site runs beside its data."""
