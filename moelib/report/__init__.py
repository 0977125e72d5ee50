"""A study's document: tables, sentences, figures."""
