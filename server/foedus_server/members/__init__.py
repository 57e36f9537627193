"""Who belongs to the consortium: sites, their keys, and the authorities that vouch for the link."""
