//! `tierwise run --chat` without a prompt: a conversation on standard input, and what shows a model's channels.
//!
//! The cache keeps the tokens of earlier turns: a turn computes from the first token at which the newly rendered
//! conversation differs from what is cached (templates may rewrite history, e.g. drop reasoning).

use crate::args::{ReasoningArg, RunArgs};
use crate::cmd::run::{Generated, generate_with};
use crate::control;
use crate::loaded::Loaded;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tierwise_runtime::chat::channels::{Channel, ChannelForm, ChannelParser};
use tierwise_runtime::chat::{ChatTemplate, Message};
use tierwise_runtime::tokenizer::{AddSpecial, Tokenizer};

const HELP: &str = "/reset        forget the conversation\n/system TEXT  another system message, and forget the conversation\n/save FILE    write the conversation as JSON messages\n/exit         end (also Ctrl-D); Ctrl-C stops an answer";

/// The template that the arguments choose.
pub fn template(args: &RunArgs, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    if let Some(path) = &args.chat_template {
        let source = std::fs::read_to_string(path).with_context(|| format!("read the chat template {}", path.display()))?;
        return Ok(ChatTemplate::for_tokenizer(&source, tokenizer)?);
    }
    Ok(if args.chatml { ChatTemplate::chatml() } else { ChatTemplate::from_tokenizer(tokenizer)? })
}

/// Takes an answer apart and prints it as it comes.
pub struct Printer {
    parser: ChannelParser,
    form: ChannelForm,
    show: bool,
    dim: bool,
    last: Channel,
    pub text: String,
    pub reasoning: String,
    pub calls: String,
}

impl Printer {
    /// For what follows `prompt`.
    pub fn new(form: ChannelForm, prompt: &str, reasoning: ReasoningArg) -> Self {
        Self {
            parser: ChannelParser::new(form, prompt),
            form,
            show: reasoning == ReasoningArg::Show,
            dim: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
            last: Channel::Text,
            text: String::new(),
            reasoning: String::new(),
            calls: String::new(),
        }
    }

    /// All is the answer.
    pub fn plain() -> Self {
        Self::new(ChannelForm::Plain, "", ReasoningArg::Show)
    }

    /// Whether the special token `text` must come through.
    pub fn is_mark(&self, text: &str) -> bool {
        self.form.is_mark(text)
    }

    pub fn push(&mut self, text: &str, ui: &Ui) -> Result<()> {
        let pieces = self.parser.push(text);
        self.take(pieces, ui)
    }

    /// The end of the answer.
    pub fn finish(&mut self, ui: &Ui) -> Result<()> {
        let pieces = self.parser.finish();
        self.take(pieces, ui)?;
        if ui.json { Ok(()) } else { ui.out(if self.dim && self.last == Channel::Reasoning { "\x1b[0m\n" } else { "\n" }) }
    }

    fn take(&mut self, pieces: Vec<(Channel, String)>, ui: &Ui) -> Result<()> {
        for (channel, text) in pieces {
            match channel {
                Channel::Reasoning => self.reasoning.push_str(&text),
                Channel::Text => self.text.push_str(&text),
                Channel::Call => self.calls.push_str(&text),
            }
            if ui.json || (channel == Channel::Reasoning && !self.show) {
                continue;
            }
            if channel != self.last {
                ui.out(match channel {
                    Channel::Reasoning if self.dim => "\x1b[2m",
                    _ if self.last == Channel::Reasoning && self.dim => "\x1b[0m\n\n",
                    _ if self.last == Channel::Reasoning => "\n\n",
                    _ => "",
                })?;
                self.last = channel;
            }
            ui.out(&text)?;
        }
        Ok(())
    }
}

/// What Ctrl-C means now: during an answer it stops the answer, at the prompt the second one ends the program.
pub struct Interrupt {
    stop: Arc<AtomicBool>,
    answering: Arc<AtomicBool>,
    at_prompt: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Listens from now on.
    pub fn install() -> Result<Self> {
        let this = Self { stop: Arc::default(), answering: Arc::default(), at_prompt: Arc::default() };
        let (stop, answering, at_prompt) = (this.stop.clone(), this.answering.clone(), this.at_prompt.clone());
        ctrlc::set_handler(move || {
            if answering.load(Ordering::SeqCst) {
                stop.store(true, Ordering::SeqCst);
            } else if at_prompt.fetch_add(1, Ordering::SeqCst) == 0 {
                eprintln!("\n(Ctrl-C again, Ctrl-D or /exit ends)");
            } else {
                control::remove_socket();
                std::process::exit(130);
            }
        })
        .context("listen for Ctrl-C")?;
        Ok(this)
    }

    fn begin_answer(&self) {
        self.stop.store(false, Ordering::SeqCst);
        self.answering.store(true, Ordering::SeqCst);
    }

    fn end_answer(&self) {
        self.answering.store(false, Ordering::SeqCst);
        self.at_prompt.store(0, Ordering::SeqCst);
    }
}

struct Chat<'a> {
    args: &'a RunArgs,
    template: ChatTemplate,
    system: Option<String>,
    messages: Vec<Message>,
    /// Tokens whose keys and values are in the cache.
    cached: Vec<u32>,
    turns: Vec<Value>,
}

/// The conversation, until the input ends.
pub fn converse(args: &RunArgs, loaded: &mut Loaded, interrupt: &Interrupt, ui: &Ui) -> Result<()> {
    let template = template(args, loaded.tokenizer()?)?;
    let mut chat =
        Chat { args, template, system: args.system.clone(), messages: Vec::new(), cached: Vec::new(), turns: Vec::new() };
    chat.forget();
    let stdin = std::io::stdin();
    let decorated = stdin.is_terminal() && !ui.json;
    if decorated {
        ui.note("/help lists the commands");
    }
    let mut line = String::new();
    loop {
        if decorated {
            ui.out("> ")?;
        }
        line.clear();
        if stdin.lock().read_line(&mut line).context("read standard input")? == 0 {
            break;
        }
        let said = line.trim_end_matches(['\n', '\r']);
        if said.trim().is_empty() {
            continue;
        }
        if said.starts_with('/') {
            match chat.command(said, ui) {
                Ok(true) => continue,
                Ok(false) => break,
                Err(e) => ui.note(format!("error: {e:#}")),
            }
            continue;
        }
        interrupt.begin_answer();
        let answered = chat.answer(said, loaded, &interrupt.stop, ui);
        interrupt.end_answer();
        answered?;
    }
    if ui.json {
        return ui.result(&json!({ "turns": chat.turns, "messages": chat.messages }), String::new);
    }
    Ok(())
}

impl Chat<'_> {
    fn forget(&mut self) {
        self.messages = self.system.as_deref().map(|s| Message::new("system", s)).into_iter().collect();
    }

    /// Carries out a line that begins with `/`; false ends the program.
    fn command(&mut self, line: &str, ui: &Ui) -> Result<bool> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match name {
            "/exit" | "/quit" => return Ok(false),
            "/help" => ui.note(HELP),
            "/reset" => self.forget(),
            "/system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                self.forget();
            }
            "/save" if rest.is_empty() => bail!("/save needs a file name"),
            "/save" => {
                save(Path::new(rest), &self.messages)?;
                ui.note(format!("{rest}: {} messages", self.messages.len()));
            }
            other => bail!("unknown command {other}; /help lists the commands"),
        }
        Ok(true)
    }

    /// One turn. What the template or the context refuses is said, and the turn forgotten.
    fn answer(&mut self, said: &str, loaded: &mut Loaded, stop: &AtomicBool, ui: &Ui) -> Result<()> {
        self.messages.push(Message::new("user", said));
        let (prompt, tokens) = match self.render(loaded) {
            Ok(rendered) => rendered,
            Err(e) => {
                self.messages.pop();
                // A pipe has nobody to try again.
                if std::io::stdin().is_terminal() {
                    ui.note(format!("error: {e:#}"));
                    return Ok(());
                }
                return Err(e);
            }
        };
        // The last token is computed anew if all are cached: its logits are needed.
        let same = self.cached.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        let reused = same.min(tokens.len() - 1);
        loaded.session.truncate(reused);
        self.cached.truncate(reused);
        let mut printer = Printer::new(self.template.form(), &prompt, self.args.reasoning);
        let sampling = &self.args.sampling;
        let made = generate_with(loaded, &tokens[reused..], sampling, self.args.ignore_eos, stop, &mut printer, ui)?;
        self.cached.extend(tokens[reused..].iter().chain(&made.tokens));
        self.cached.truncate(loaded.session.len());
        self.keep(&made, &printer, tokens.len(), reused);
        match made.stop {
            "length" => ui.detail(format!("(stopped after {} tokens; -n allows more)", made.tokens.len())),
            "context full" => ui.note(format!(
                "the context of {} tokens is full: /reset forgets the conversation, --context N makes room for more",
                loaded.session.context()
            )),
            "interrupted" => ui.note("(stopped)"),
            _ => {}
        }
        Ok(())
    }

    fn render(&self, loaded: &Loaded) -> Result<(String, Vec<u32>)> {
        let prompt = self.template.render(&self.messages, None, true)?;
        let tokens = loaded.tokenizer()?.encode(&prompt, AddSpecial::Never, true)?;
        let context = loaded.session.context();
        if tokens.is_empty() {
            bail!("the chat template makes an empty prompt of this conversation");
        }
        if tokens.len() >= context {
            bail!(
                "the conversation has {} tokens and the context {context}: /reset forgets it, --context N makes room for more",
                tokens.len()
            );
        }
        Ok((prompt, tokens))
    }

    /// The answer into the history; without one the question goes too.
    fn keep(&mut self, made: &Generated, printer: &Printer, prompt_tokens: usize, reused: usize) {
        self.turns.push(json!({
            "text": printer.text, "reasoning": printer.reasoning.trim_end(), "calls": printer.calls, "tokens": made.tokens,
            "prompt_tokens": prompt_tokens, "reused_tokens": reused, "stop": made.stop, "seed": made.seed,
        }));
        if made.tokens.is_empty() && made.stop == "interrupted" {
            self.messages.pop();
            return;
        }
        let mut message = Message::new("assistant", printer.text.clone());
        let reasoning = printer.reasoning.trim_end();
        if !reasoning.is_empty() {
            let name = if self.template.form() == ChannelForm::Harmony { "thinking" } else { "reasoning_content" };
            message.extra.insert(name.to_owned(), reasoning.into());
        }
        self.messages.push(message);
    }
}

/// Writes to a temporary file in the same folder, then renames it.
fn save(path: &Path, messages: &[Message]) -> Result<()> {
    let mut name = path.file_name().context("/save: the name of a file is expected")?.to_os_string();
    name.push(".partial");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(serde_json::to_string_pretty(messages)?.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}
