//! What one more GiB or GB/s is worth.
