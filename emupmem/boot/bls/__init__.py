"""The Boot Loader Specification: texts, entries and sources that three loaders share."""
