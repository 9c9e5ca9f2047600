"""Make corpora and teachers: synthetic speech, packed samples, phone labels, real speech for a study."""
