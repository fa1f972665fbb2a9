//! What a placement does on the part of a trace that it was not made from.
