//! A small matcher of regular expressions, as far as exports use them: alternatives, groups, classes, `.`, `*`, `+`, `?`, `^`, `$`, escapes.
//!
//! It searches anywhere in the text, as `std::regex_search` does for llama.cpp and `Regex::is_match` for mistral.rs. Backtracking, with
//! a limit on depth; only for checking what this program wrote itself.

/// One piece of a pattern.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Char(char),
    Any,
    Class { negated: bool, ranges: Vec<(char, char)> },
    Group(Vec<Vec<Piece>>),
    Repeat { piece: Box<Piece>, least: usize, most: usize },
    Start,
    End,
}

/// A pattern.
#[derive(Debug, Clone, PartialEq)]
pub struct Pattern(Vec<Vec<Piece>>);

impl Pattern {
    /// Reads one; `None` for syntax that is not known here.
    pub fn new(text: &str) -> Option<Self> {
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        let alternatives = alternatives(&chars, &mut at, 0)?;
        (at == chars.len()).then_some(Self(alternatives))
    }

    /// Does it match anywhere in the text?
    pub fn is_match(&self, text: &str) -> bool {
        let chars: Vec<char> = text.chars().collect();
        (0..=chars.len()).any(|from| self.0.iter().any(|a| matches(a, &chars, from, &|_| true)))
    }
}

fn alternatives(chars: &[char], at: &mut usize, depth: usize) -> Option<Vec<Vec<Piece>>> {
    if depth > 16 {
        return None;
    }
    let mut out = vec![Vec::new()];
    while *at < chars.len() && chars[*at] != ')' {
        let c = chars[*at];
        *at += 1;
        let piece = match c {
            '|' => {
                out.push(Vec::new());
                continue;
            }
            '(' => {
                let inner = alternatives(chars, at, depth + 1)?;
                if chars.get(*at) != Some(&')') {
                    return None;
                }
                *at += 1;
                Piece::Group(inner)
            }
            '[' => class(chars, at)?,
            '.' => Piece::Any,
            '^' => Piece::Start,
            '$' => Piece::End,
            '\\' => {
                let escaped = *chars.get(*at)?;
                *at += 1;
                match escaped {
                    'd' => Piece::Class { negated: false, ranges: vec![('0', '9')] },
                    c if c.is_ascii_punctuation() => Piece::Char(c),
                    _ => return None,
                }
            }
            '*' | '+' | '?' | '{' | '}' => return None,
            c => Piece::Char(c),
        };
        let (least, most) = match chars.get(*at) {
            Some('*') => (0, usize::MAX),
            Some('+') => (1, usize::MAX),
            Some('?') => (0, 1),
            _ => (1, 1),
        };
        let last = out.last_mut().expect("there is one alternative");
        if (least, most) == (1, 1) {
            last.push(piece);
        } else {
            *at += 1;
            last.push(Piece::Repeat { piece: Box::new(piece), least, most });
        }
    }
    Some(out)
}

fn class(chars: &[char], at: &mut usize) -> Option<Piece> {
    let negated = chars.get(*at) == Some(&'^');
    *at += usize::from(negated);
    let mut ranges = Vec::new();
    loop {
        let mut c = *chars.get(*at)?;
        *at += 1;
        if c == ']' {
            return (!ranges.is_empty()).then_some(Piece::Class { negated, ranges });
        }
        if c == '\\' {
            c = *chars.get(*at)?;
            *at += 1;
        }
        if chars.get(*at) == Some(&'-') && chars.get(*at + 1).is_some_and(|e| *e != ']') {
            ranges.push((c, chars[*at + 1]));
            *at += 2;
        } else {
            ranges.push((c, c));
        }
    }
}

/// Matches pieces from a place on, then what comes after.
fn matches(pieces: &[Piece], text: &[char], at: usize, then: &dyn Fn(usize) -> bool) -> bool {
    let Some((first, rest)) = pieces.split_first() else { return then(at) };
    let next = |end: usize| matches(rest, text, end, then);
    match first {
        Piece::Repeat { piece, least, most } => repeat(piece, *least, *most, text, at, &next),
        one => single(one, text, at, &next),
    }
}

fn single(piece: &Piece, text: &[char], at: usize, then: &dyn Fn(usize) -> bool) -> bool {
    match piece {
        Piece::Start => at == 0 && then(at),
        Piece::End => at == text.len() && then(at),
        Piece::Group(alternatives) => alternatives.iter().any(|a| matches(a, text, at, then)),
        Piece::Repeat { .. } => false,
        one => text.get(at).is_some_and(|c| is_of(one, *c)) && then(at + 1),
    }
}

fn is_of(piece: &Piece, c: char) -> bool {
    match piece {
        Piece::Char(x) => *x == c,
        Piece::Any => c != '\n',
        Piece::Class { negated, ranges } => ranges.iter().any(|(a, b)| (*a..=*b).contains(&c)) != *negated,
        _ => false,
    }
}

fn repeat(piece: &Piece, least: usize, most: usize, text: &[char], at: usize, then: &dyn Fn(usize) -> bool) -> bool {
    let again =
        |end: usize| end > at && repeat(piece, least.saturating_sub(1), most - usize::from(most != usize::MAX), text, end, then);
    (most > 0 && single(piece, text, at, &again)) || (least == 0 && then(at))
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn patterns_match_as_in_the_books() {
        #[rustfmt::skip]
        let table = [
            (r"blk\.(3|4|10)\.ffn_(up|gate|down)_exps", "blk.10.ffn_gate_exps.weight", true),
            (r"blk\.(3|4|10)\.ffn_(up|gate|down)_exps", "blk.1.ffn_gate_exps.weight", false),
            (r"blk\.(3|4|10)\.ffn_(up|gate|down)_exps", "blk.104.ffn_gate_exps.weight", false),
            (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "blk.7.ffn_gate_up_exps.weight", true),
            (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "blk.7.ffn_down_chexps.weight", true),
            (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "blk.7.ffn_up_shexp.weight", false),
            (r"^blk\.([0-9]|[12][0-9])\.", "blk.29.x", true),
            (r"^blk\.([0-9]|[12][0-9])\.", "blk.30.x", false),
            (r"a+b*c?$", "xaabb", true),
            (r"a+b*c?$", "bb", false),
            (r"[^0-9]x", "ax", true),
            (r"[^0-9]x", "1x", false),
            (r"(a|ab)(c|bcd)(d*)$", "abcd", true),
        ];
        for (pattern, text, expected) in table {
            assert_eq!(Pattern::new(pattern).expect(pattern).is_match(text), expected, "{pattern} on {text}");
        }
        for wrong in ["(a", "a)", "[a", "*a", "a{2}", "a\\"] {
            assert!(Pattern::new(wrong).is_none(), "{wrong}");
        }
    }
}
