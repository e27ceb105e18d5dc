"""Reading and writing weights. Nothing else in sdjax opens a weight file or talks to the Hub."""
