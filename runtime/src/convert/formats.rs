//! Which tensor gets which format: the recipe, what the user wants for a role, and what the rows allow.

use super::{ConvertOptions, shape_of, spec_with};
use crate::error::{Result, RuntimeError};
use tierwise_cost::model::{Geometry, ModelSpec, RoleGroup, TensorRole, TensorSpec};
use tierwise_cost::quant::QuantFormat;
use tierwise_cost::recipe::fit_rows;

/// A format for all matrices of a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleFormat {
    /// The role, as `inspect` counts them.
    pub role: RoleGroup,
    /// Its format.
    pub format: QuantFormat,
}

/// Tensors that got another format than asked for, because their rows are not whole blocks of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// What was asked for.
    pub wanted: QuantFormat,
    /// What they got.
    pub used: QuantFormat,
    /// How many tensors.
    pub num_tensors: usize,
    /// Elements of a row of the first of them.
    pub cols: u64,
    /// Its name.
    pub first: String,
}

/// Reads `experts=Q4_K,attention=Q8_0`; later ones go before earlier ones.
///
/// # Errors
/// For an unknown role or format, with the known names.
pub fn role_formats(texts: &[String]) -> Result<Vec<RoleFormat>> {
    texts.iter().flat_map(|t| t.split(',')).filter(|t| !t.trim().is_empty()).map(role_format).collect()
}

fn role_format(text: &str) -> Result<RoleFormat> {
    let bad = |expected: String| RuntimeError::BadRequest { what: "--role", found: format!("{text:?}"), expected };
    let known = || RoleGroup::ALL.iter().map(|g| g.name().replace(' ', "-")).collect::<Vec<_>>().join(", ");
    let Some((role, format)) = text.split_once('=') else {
        return Err(bad("ROLE=FORMAT, e.g. experts=Q4_K".into()));
    };
    let name = role.trim().to_lowercase().replace(['-', '_'], " ");
    let name = match name.as_str() {
        "experts" => "routed experts",
        "dense" | "ffn" => "dense ffn",
        "shared" => "shared experts",
        other => other,
    };
    let Some(role) = RoleGroup::ALL.iter().copied().find(|g| g.name() == name) else {
        return Err(bad(format!("a role: {}", known())));
    };
    let format: QuantFormat = format.trim().parse()?;
    if format == QuantFormat::Q8_K {
        return Err(bad("a format for weights; Q8_K is one for activations".into()));
    }
    Ok(RoleFormat { role, format })
}

/// The model with the formats it will have, and where they are not those asked for.
pub(super) fn choose(geometry: Geometry, stored: &[TensorSpec], options: &ConvertOptions) -> Result<(ModelSpec, Vec<Fallback>)> {
    let mut tensors = Vec::with_capacity(stored.len());
    let mut fallbacks: Vec<Fallback> = Vec::new();
    for t in stored {
        let shape = shape_of(t);
        let cols = shape.shape.last().copied().unwrap_or(1);
        let asked = options.roles.iter().rev().find(|r| r.role == t.role.group()).map(|r| r.format);
        // Vectors and biases are added or multiplied element by element: always float32.
        let is_matrix = shape.shape.len() > 1
            && !t.role.is_elementwise()
            && (t.role.group() != RoleGroup::Router || t.role == TensorRole::Router);
        let wanted = match asked {
            Some(format) if is_matrix => format,
            _ => options.recipe.wanted_format(&geometry, &shape),
        };
        let used = fit_rows(wanted, cols);
        if used != wanted {
            match fallbacks.iter_mut().find(|f| (f.wanted, f.used) == (wanted, used)) {
                Some(f) => f.num_tensors += 1,
                None => fallbacks.push(Fallback { wanted, used, num_tensors: 1, cols, first: t.name.clone() }),
            }
        }
        tensors.push(TensorSpec::new(shape, used)?);
    }
    Ok((spec_with(geometry, tensors, &options.recipe), fallbacks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_and_refused() {
        let texts = |t: &[&str]| role_formats(&t.iter().map(|t| t.to_string()).collect::<Vec<_>>());
        let read = texts(&["experts=q4_k,attention=Q8_0", "shared-experts=Q6_K"]).expect("valid");
        assert_eq!(read[0], RoleFormat { role: RoleGroup::RoutedExperts, format: QuantFormat::Q4_K });
        assert_eq!(read[1], RoleFormat { role: RoleGroup::Attention, format: QuantFormat::Q8_0 });
        assert_eq!(read[2], RoleFormat { role: RoleGroup::SharedExperts, format: QuantFormat::Q6_K });
        for (text, expected) in
            [("experts", "ROLE=FORMAT"), ("lips=Q4_K", "routed-experts"), ("experts=Q9", "Q4_K"), ("experts=Q8_K", "activations")]
        {
            let message = texts(&[text]).expect_err("refused").to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
