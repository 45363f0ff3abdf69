"""Model directories that ship with the package, found by the name `asset:NAME`."""
