"""A page to try an adapter on: pictures of one prompt at several strengths, side by side."""
