"""What would break the promises, found before an outage finds it. No mount is touched."""
