"""Pictures, pages and numbers for people, made from the record; training never depends on them."""
