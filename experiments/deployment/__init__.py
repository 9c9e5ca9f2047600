"""Commands that measure a student as it will be used."""
