//! Capacity studies: what to expect of machines one might buy.
//!
//! * [`study`]: the study file: a question, a base, what is swept; [`values`]: lists and ranges of what is swept;
//! * [`point`]: one combination, and the hypothetical machine that it means; [`row`]: what to expect of it;
//! * [`pareto`]: the combinations that no other beats.
//!
//! Nothing here reads files or runs threads: the caller opens models, machines and traces by name and evaluates rows in any order.

pub mod pareto;
pub mod point;
pub mod row;
pub mod study;
pub mod values;

pub use pareto::pareto_front;
pub use point::Point;
pub use row::{Expected, Opened, Row, evaluate_point, marginals_of_point};
pub use study::{Base, ServingPart, Study, Sweep};
