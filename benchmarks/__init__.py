"""What this project's speed and quality are measured with: `make bench`, `make quality`. Not part of the package."""
