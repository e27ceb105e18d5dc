"""What runs the networks: compiled programs, parameters on a mesh, tiles, caches."""
