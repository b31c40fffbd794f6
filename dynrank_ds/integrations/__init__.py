"""Use of the methods in trainers of other libraries."""
