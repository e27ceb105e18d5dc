"""Pictures: pixels, files and what they carry."""
