"""Plain data in and out: JSON, YAML, fields of configs, patterns of names, whole files."""
