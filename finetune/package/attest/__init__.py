"""The origin of a package: provenance, bill of materials, licence, signature."""
