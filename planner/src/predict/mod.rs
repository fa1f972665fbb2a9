//! Predicts published runs of other engines from their description.
