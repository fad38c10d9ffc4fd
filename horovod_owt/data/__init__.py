"""The way of one image: store, order, feed, pipeline. Importing this imports neither torch nor DALI."""
