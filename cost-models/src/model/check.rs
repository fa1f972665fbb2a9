//! Which sizes are possible.

use super::{Activation, Attention, Ffn, Geometry, Moe, Rope, RopeScaling, RouterScore, Selection};
use crate::error::CostError;

impl Geometry {
    /// Checks that every size is possible.
    ///
    /// # Errors
    /// [`CostError::BadModel`] with the field, its value and what is allowed.
    pub fn check(&self) -> Result<(), CostError> {
        let bad = |field: String, found: String, expected: &str| {
            Err(CostError::BadModel { model: self.name.clone(), field, found, expected: expected.to_string() })
        };
        let range = |field: &str, value: u32, max: u32| {
            if value == 0 || value > max { bad(field.to_string(), value.to_string(), &format!("1 to {max}")) } else { Ok(()) }
        };
        range("hidden_size", self.hidden_size, 1 << 20)?;
        range("vocab_size", self.vocab_size, 1 << 24)?;
        range("context_length", self.context_length, 1 << 30)?;
        range("num_layers", self.layers.len().try_into().unwrap_or(u32::MAX), 4096)?;
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return bad("norm_eps".into(), self.norm_eps.to_string(), "a number between 0 and 1");
        }
        let s = &self.scales;
        for (name, value) in [
            ("scales embedding", s.embedding),
            ("scales residual", s.residual),
            ("scales logits", s.logits),
            ("scales logits_softcap", s.logits_softcap.unwrap_or(1.0)),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return bad(name.into(), value.to_string(), "a positive number");
            }
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let field = |name: &str| format!("layer {i} {name}");
            match &layer.attention {
                Attention::Gqa(a) => {
                    range(&field("num_heads"), a.num_heads, 4096)?;
                    range(&field("num_kv_heads"), a.num_kv_heads, a.num_heads)?;
                    range(&field("head_dim"), a.head_dim, 4096)?;
                    if !a.num_heads.is_multiple_of(a.num_kv_heads) {
                        return bad(field("num_kv_heads"), a.num_kv_heads.to_string(), "a divisor of num_heads");
                    }
                    if let Some(rope) = &a.rope {
                        rope.check(&field("rope"), a.head_dim).or_else(|(f, found, expected)| bad(f, found, &expected))?;
                    }
                    range(&field("sliding_window"), a.sliding_window.unwrap_or(1), 1 << 30)?;
                    range(&field("chunk"), a.chunk.unwrap_or(1), 1 << 30)?;
                    let numbers = [("scale", a.scale), ("softcap", a.softcap), ("temperature", a.temperature.map(|t| t.scale))];
                    for (name, value) in numbers {
                        if let Some(v) = value.filter(|v| !(v.is_finite() && *v > 0.0)) {
                            return bad(field(name), v.to_string(), "a positive number");
                        }
                    }
                    range(&field("temperature period"), a.temperature.map_or(1, |t| t.period), 1 << 30)?;
                }
                Attention::Mla(a) => {
                    range(&field("num_heads"), a.num_heads, 4096)?;
                    range(&field("q_lora_rank"), a.q_lora_rank.unwrap_or(1), 1 << 16)?;
                    range(&field("kv_lora_rank"), a.kv_lora_rank, 1 << 16)?;
                    range(&field("qk_nope_head_dim"), a.qk_nope_head_dim, 4096)?;
                    range(&field("qk_rope_head_dim"), a.qk_rope_head_dim, 4096)?;
                    range(&field("v_head_dim"), a.v_head_dim, 4096)?;
                    if let Some(v) = a.scale.filter(|v| !(v.is_finite() && *v > 0.0)) {
                        return bad(field("scale"), v.to_string(), "a positive number");
                    }
                    a.rope.check(&field("rope"), a.qk_rope_head_dim).or_else(|(f, found, expected)| bad(f, found, &expected))?;
                }
                Attention::DeltaNet(a) => {
                    range(&field("num_key_heads"), a.num_key_heads, 4096)?;
                    range(&field("num_value_heads"), a.num_value_heads, 4096)?;
                    range(&field("key_head_dim"), a.key_head_dim, 4096)?;
                    range(&field("value_head_dim"), a.value_head_dim, 4096)?;
                    range(&field("conv_kernel"), a.conv_kernel, 256)?;
                    if !a.num_value_heads.is_multiple_of(a.num_key_heads) {
                        return bad(field("num_key_heads"), a.num_key_heads.to_string(), "a divisor of num_value_heads");
                    }
                }
                Attention::PlanOnly(m) => {
                    // 2^40 elements is more than any whole model has; sums over 4096 such layers still fit 64 bits.
                    for (name, value) in [
                        ("weight_elements", m.weight_elements),
                        ("kv_elements_per_token", m.kv_elements_per_token),
                        ("state_elements", m.state_elements),
                    ] {
                        if value > 1 << 40 {
                            return bad(field(name), value.to_string(), "0 to 2^40");
                        }
                    }
                }
            }
            match &layer.ffn {
                Ffn::Dense(d) => range(&field("inner_size"), d.inner_size, 1 << 20)?,
                Ffn::Moe(m) => {
                    range(&field("num_experts"), m.num_experts, 1 << 16)?;
                    range(&field("experts_per_token"), m.experts_per_token, m.num_experts)?;
                    range(&field("inner_size"), m.inner_size, 1 << 20)?;
                    range(&field("latent_size"), m.latent_size.unwrap_or(1), 1 << 20)?;
                    range(&field("parallel_dense_inner_size"), m.parallel_dense_inner_size.unwrap_or(1), 1 << 20)?;
                    if !m.router.scale.is_finite() {
                        return bad(field("router scale"), m.router.scale.to_string(), "a finite number");
                    }
                    if let Activation::ClampedSwiglu { alpha, limit } = m.activation
                        && !(alpha.is_finite() && limit.is_finite() && limit > 0.0)
                    {
                        return bad(
                            field("activation"),
                            format!("alpha {alpha}, limit {limit}"),
                            "finite numbers, a positive limit",
                        );
                    }
                    m.check_number_of_experts(&field("")).or_else(|(f, found, expected)| bad(f, found, expected))?;
                    if m.router.score == RouterScore::SparseMixer && m.experts_per_token != 2 {
                        return bad(field("experts_per_token"), m.experts_per_token.to_string(), "2, as this routing rule says");
                    }
                    if let Some((groups, kept)) = m.router.groups
                        && (groups == 0 || !m.num_experts.is_multiple_of(groups) || kept == 0 || kept > groups)
                    {
                        return bad(
                            field("router groups"),
                            format!("{groups} groups, {kept} kept"),
                            "groups that divide the experts",
                        );
                    }
                    if let Some((groups, kept)) = m.router.groups
                        && m.num_experts / groups * kept < m.experts_per_token
                    {
                        let expected = "enough experts in the groups kept for experts_per_token";
                        return bad(field("router groups"), format!("{groups} groups, {kept} kept"), expected);
                    }
                    if let Some(s) = &m.shared {
                        range(&field("shared inner_size"), s.inner_size, 1 << 20)?;
                    }
                }
                Ffn::None => {}
            }
        }
        Ok(())
    }
}

impl Moe {
    /// `Err((field, found, expected))` when a varying number of experts, or repeated ones, make no sense.
    fn check_number_of_experts(&self, field: &str) -> Result<(), (String, String, &'static str)> {
        if self.iterations == 0 || self.iterations > 64 {
            return Err((format!("{field}iterations"), self.iterations.to_string(), "1 to 64"));
        }
        if let Some(mean) = self.mean_experts_per_token.filter(|m| !(*m >= 1.0 && *m <= self.experts_per_token as f32)) {
            return Err((format!("{field}mean_experts_per_token"), mean.to_string(), "1 to experts_per_token"));
        }
        let number = match self.router.selection {
            Selection::TopK => return Ok(()),
            Selection::TopP { p: number } | Selection::Threshold { min_score: number } => number,
        };
        if !(number > 0.0 && number <= 1.0) {
            return Err((format!("{field}router selection"), number.to_string(), "a number above 0, up to 1"));
        }
        let r = &self.router;
        if r.selection_bias || r.groups.is_some() || !matches!(r.score, RouterScore::Softmax | RouterScore::Sigmoid) {
            let expected = "softmax or sigmoid scores without selection bias and groups";
            return Err((format!("{field}router selection"), format!("{:?} of a rule with other parts", r.selection), expected));
        }
        Ok(())
    }
}

impl Rope {
    /// `Err((field, found, expected))` when the rotation does not fit a head of `head_dim`.
    fn check(&self, field: &str, head_dim: u32) -> Result<(), (String, String, String)> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err((format!("{field} theta"), self.theta.to_string(), "a positive number".into()));
        }
        if self.rotary_dim == 0 || self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2) {
            return Err((format!("{field} rotary_dim"), self.rotary_dim.to_string(), format!("an even number up to {head_dim}")));
        }
        let positive = |name: &str, value: f32| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err((format!("{field} scaling {name}"), value.to_string(), "a positive number".to_string()))
            }
        };
        let divisors = |name: &str, values: &[f32]| {
            if values.len() != self.rotary_dim as usize / 2 {
                let expected = format!("{} of them, half of rotary_dim", self.rotary_dim / 2);
                return Err((format!("{field} scaling {name}"), values.len().to_string(), expected));
            }
            values.iter().try_for_each(|v| positive(name, *v))
        };
        match &self.scaling {
            None => Ok(()),
            Some(RopeScaling::Linear { factor }) => positive("factor", *factor),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                // Equal ones, as Llama-4 has them, leave nothing to interpolate.
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor < low_freq_factor {
                    let expected = format!("at least low_freq_factor, {low_freq_factor}");
                    return Err((format!("{field} scaling high_freq_factor"), high_freq_factor.to_string(), expected));
                }
                positive("original_context", *original_context as f32)
            }
            Some(RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. }) => {
                positive("factor", *factor)?;
                positive("original_context", *original_context as f32)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention_factor", *attention_factor)
            }
            Some(RopeScaling::LongRope {
                original_context,
                short_divisors,
                long_divisors,
                short_attention_factor,
                long_attention_factor,
            }) => {
                positive("original_context", *original_context as f32)?;
                divisors("short_divisors", short_divisors)?;
                divisors("long_divisors", long_divisors)?;
                positive("short_attention_factor", *short_attention_factor)?;
                positive("long_attention_factor", *long_attention_factor)
            }
            Some(RopeScaling::Divisors { divisors: values }) => divisors("divisors", values),
        }
    }
}
