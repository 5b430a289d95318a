"""The cockpit: steering by hand, in a web page or in a terminal, and the whole loop from there to a noise policy."""
