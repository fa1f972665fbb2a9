//! Requests that arrive over time: continuous batching with keys and values and experts sharing the memory.
