//! Capacity studies: what to expect of machines one might buy.
