"""The input pipeline: store, order, feed, pipeline. Importing this loads neither torch nor DALI."""
