"""Speed beside the peers: `make bench`; whether "auto" chooses well: `make bench-check`."""
