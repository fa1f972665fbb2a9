//! Figures as inline SVG, drawn with plotters. Legends are left to the page: text beside a figure never covers it.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Colours that differ for most eyes and in print (Okabe and Ito), without the pale yellow.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
    RGBColor(120, 60, 20),
];
const INK: RGBColor = RGBColor(34, 34, 34);
const GRID: RGBColor = RGBColor(226, 226, 226);
const FONT: &str = "system-ui, sans-serif";

/// Most series that a reader can tell apart.
pub const MOST_SERIES: usize = COLOURS.len();

/// The colour of series `i` as CSS.
pub fn colour(i: usize) -> String {
    let RGBColor(r, g, b) = COLOURS[i % COLOURS.len()];
    format!("rgb({r},{g},{b})")
}

/// Points that belong together.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Ends of each point's interval; empty for none.
    pub ends: Vec<(f64, f64)>,
    /// Join the points.
    pub line: bool,
}

/// What the axes say.
pub struct Axes<'a> {
    pub x: &'a str,
    pub y: &'a str,
    pub log_x: bool,
    pub log_y: bool,
    /// A horizontal line: what is promised.
    pub limit: Option<f64>,
}

fn failed(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing a figure failed: {e}")
}

/// The range that shows all values: from 0 on linear axes, with room at the ends.
fn range(values: impl Iterator<Item = f64>, log: bool, from_zero: bool) -> (f64, f64) {
    let (low, high) = values
        .filter(|v| v.is_finite() && (!log || *v > 0.0))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return (if log { 0.1 } else { 0.0 }, 1.0);
    }
    if log {
        return (low / 1.3, high * 1.3);
    }
    let span = if high > low { high - low } else { high.abs().max(1.0) };
    (if from_zero { 0.0 } else { (low - 0.06 * span).max(0.0) }, high + 0.08 * span)
}

/// A number on an axis.
fn tick(v: f64) -> String {
    let v = if v.abs() < 1e-12 { 0.0 } else { v };
    match v.abs() {
        0.0 => "0".into(),
        a if a < 1e6 && (v - v.round()).abs() < 1e-9 => format!("{v:.0}"),
        a if a >= 10_000.0 => format!("{:.0}k", v / 1000.0),
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 1.0 => trimmed(format!("{v:.1}")),
        a if a >= 0.001 => trimmed(format!("{v:.3}")),
        _ => format!("{v:.0e}"),
    }
}

/// Where an axis is labelled: at the values themselves when they are few and can be written, else at round numbers.
fn ticks(values: &[f64], range: (f64, f64), log: bool) -> Vec<f64> {
    let at = |v: f64| if log { v.ln() } else { v };
    let mut own: Vec<f64> = values.to_vec();
    own.sort_by(f64::total_cmp);
    own.dedup();
    let readable = own.iter().all(|v| tick(*v).parse::<f64>().is_ok_and(|t| (t - v).abs() < 1e-9 * v.abs().max(1.0)));
    let apart = own.windows(2).all(|w| at(w[1]) - at(w[0]) > 0.05 * (at(range.1) - at(range.0)));
    if (2..=10).contains(&own.len()) && readable && apart {
        return own;
    }
    if log {
        let (first, last) = (range.0.log10().floor() as i32, range.1.log10().ceil() as i32);
        let steps: &[f64] = if last - first <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        return (first..=last)
            .flat_map(|d| steps.iter().map(move |m| m * 10_f64.powi(d)))
            .filter(|v| (range.0..=range.1).contains(v))
            .collect();
    }
    let rough = (range.1 - range.0) / 6.0;
    let decade = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * decade).find(|s| *s >= rough).unwrap_or(rough);
    let first = (range.0 / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|v| *v <= range.1).collect()
}

fn trimmed(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

/// An axis: linear or logarithmic, labelled where it is told to be.
struct Scale {
    range: (f64, f64),
    ticks: Vec<f64>,
    log: bool,
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let at = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let share = (at(*value) - at(self.range.0)) / (at(self.range.1) - at(self.range.0));
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.0..self.range.1
    }
}

/// Points, lines and intervals over two axes.
pub fn chart(axes: &Axes<'_>, series: &[Series], size: (u32, u32)) -> Result<String> {
    let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
    let ys = || {
        let points = series.iter().flat_map(|s| s.points.iter().map(|p| p.1));
        points.chain(series.iter().flat_map(|s| s.ends.iter().flat_map(|e| [e.0, e.1]))).chain(axes.limit)
    };
    let (x, y) = (range(xs(), axes.log_x, false), range(ys(), axes.log_y, true));
    let x_ends = x;
    let x = Scale { ticks: ticks(&xs().collect::<Vec<_>>(), x, axes.log_x), range: x, log: axes.log_x };
    let y = Scale { ticks: ticks(&[], y, axes.log_y), range: y, log: axes.log_y };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .margin_right(24)
            .x_label_area_size(46)
            .y_label_area_size(66)
            .build_cartesian_2d(x, y)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .y_desc(axes.y)
            .x_label_formatter(&|v| tick(*v))
            .y_label_formatter(&|v| tick(*v))
            .label_style((FONT, 14, &INK))
            .axis_desc_style((FONT, 15, &INK))
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(failed)?;
        if let Some(limit) = axes.limit {
            let ends = [(x_ends.0, limit), (x_ends.1, limit)];
            chart.draw_series(DashedLineSeries::new(ends, 6, 4, INK.stroke_width(1))).map_err(failed)?;
        }
        for (i, s) in series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            for (p, (low, high)) in s.points.iter().zip(&s.ends) {
                let bar = PathElement::new(vec![(p.0, *low), (p.0, *high)], colour.mix(0.35).stroke_width(2));
                chart.draw_series(std::iter::once(bar)).map_err(failed)?;
            }
            if s.line {
                chart.draw_series(LineSeries::new(s.points.iter().copied(), colour.stroke_width(2))).map_err(failed)?;
            }
            let points = s.points.iter().copied();
            // Shapes differ too: not every printer has colours.
            match i % 3 {
                0 => chart.draw_series(points.map(|p| Circle::new(p, 5, colour.filled()))).map_err(failed)?,
                1 => chart.draw_series(points.map(|p| TriangleMarker::new(p, 7, colour.filled()))).map_err(failed)?,
                _ => chart.draw_series(points.map(|p| Cross::new(p, 5, colour.stroke_width(2)))).map_err(failed)?,
            };
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// One bar.
pub struct Bar {
    pub label: String,
    pub value: f64,
    /// Ends of its interval.
    pub ends: Option<(f64, f64)>,
    /// The value in words.
    pub text: String,
}

/// Horizontal bars with their labels on the left; `at_least` is the least value that the longest bar stands for, so that figures can
/// share a scale.
pub fn bars(list: &[Bar], series: usize, at_least: f64) -> Result<String> {
    const WIDTH: i32 = 900;
    const ROW: i32 = 30;
    let longest = list.iter().map(|b| b.label.chars().count()).max().unwrap_or(0) as i32;
    // 7.4 pixels: a little more than the mean width of a character at this size.
    let left = (longest * 74 / 10 + 16).min(WIDTH / 2);
    let height = 12 + ROW * list.len() as i32;
    let largest =
        list.iter().map(|b| b.ends.map_or(b.value, |e| e.1).max(b.value)).fold(at_least.max(f64::MIN_POSITIVE), f64::max);
    let room = f64::from(WIDTH - left - 190);
    let x = |v: f64| left + (v.max(0.0) / largest * room).round() as i32;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        let colour = COLOURS[series % COLOURS.len()];
        let font = |h| TextStyle::from((FONT, 14).into_font()).color(&INK).pos(Pos::new(h, VPos::Center));
        for (i, b) in list.iter().enumerate() {
            let top = 6 + ROW * i as i32;
            let middle = top + ROW / 2;
            root.draw(&Text::new(b.label.clone(), (left - 8, middle), font(HPos::Right))).map_err(failed)?;
            let bar = Rectangle::new([(left, top + 5), (x(b.value).max(left + 1), top + ROW - 5)], colour.mix(0.85).filled());
            root.draw(&bar).map_err(failed)?;
            let mut end = x(b.value);
            if let Some((low, high)) = b.ends {
                let whisker = PathElement::new(vec![(x(low), middle), (x(high), middle)], INK.stroke_width(1));
                root.draw(&whisker).map_err(failed)?;
                for e in [low, high] {
                    let tip = PathElement::new(vec![(x(e), middle - 4), (x(e), middle + 4)], INK.stroke_width(1));
                    root.draw(&tip).map_err(failed)?;
                }
                end = end.max(x(high));
            }
            root.draw(&Text::new(b.text.clone(), (end + 8, middle), font(HPos::Left))).map_err(failed)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_figures_is_escaped() {
        let bar = Bar { label: "<script>alert(1)</script>".into(), value: 1.0, ends: Some((0.5, 2.0)), text: "a & b".into() };
        let svg = bars(&[bar], 0, 0.0).unwrap();
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;") && svg.contains("a &amp; b"), "{svg}");
    }

    #[test]
    fn every_scale_draws_even_without_points() {
        for (log_x, log_y) in [(false, false), (true, false), (false, true), (true, true)] {
            let axes = Axes { x: "x", y: "y", log_x, log_y, limit: Some(0.5) };
            for points in [vec![], vec![(1.0, 1.0)], vec![(1.0, 0.2), (100.0, 4000.0)]] {
                let ends = points.iter().map(|p: &(f64, f64)| (p.1 * 0.5, p.1 * 2.0)).collect();
                let svg = chart(&axes, &[Series { name: "s".into(), points, ends, line: true }], (600, 300)).unwrap();
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            }
        }
    }

    #[test]
    fn ticks_are_short() {
        for (v, text) in [
            (0.0, "0"),
            (32_768.0, "32768"),
            (123_456.7, "123k"),
            (250.0, "250"),
            (2.5, "2.5"),
            (3.0, "3"),
            (0.05, "0.05"),
            (1e-4, "1e-4"),
        ] {
            assert_eq!(tick(v), text);
        }
    }
}
