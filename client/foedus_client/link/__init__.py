"""The site's end of the link to the coordinator."""
