// The root command: what all commands share - directories, output format, errors and exit status.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

const (
	outputText = "text"
	outputJSON = "json"
)

// Variables of the environment that stand in for flags.
const (
	envRuntimeDir   = "ROOTLESS_OVL_RUNTIME_DIR"
	envStateDir     = "ROOTLESS_OVL_STATE_DIR"
	envEtcdPassword = "ROOTLESS_OVL_ETCD_PASSWORD"
)

// app is one invocation of the program.
type app struct {
	world
	output     choice
	runtimeDir string // as given; runtime() says which it is
	stateDir   string
	started    bool // the command line was understood; errors from here on are not about it
	ownStdout  bool // standard output belongs to somebody else: no JSON error on it
}

// usageError is a command line that cannot be right. Its text says what to do.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitStatus ends the program with that status; what there was to say has been said.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// execute runs one command line and returns its exit status.
func execute(ctx context.Context, w world, args []string) int {
	a := &app{world: w, output: choice{value: outputText, of: []string{outputText, outputJSON}}}
	root := a.root()
	if cmd, rest, err := root.Find(args); err == nil && cmd.Name() == upName {
		args = append([]string{upName}, doubleDashes(cmd, rest)...)
	}
	root.SetArgs(args)
	if len(args) > 0 && (args[0] == cobra.ShellCompRequestCmd || args[0] == cobra.ShellCompNoDescRequestCmd) {
		plainUsage(root)
	}
	cmd, err := root.ExecuteContextC(ctx)
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	if errors.As(err, new(usageError)) {
		a.report(err, api.CodeInvalid)
		return exitUsage
	}
	if !a.started { // cobra does not say what to do
		a.report(fmt.Errorf("%w: see `%s --help`", err, cmd.CommandPath()), api.CodeInvalid)
		return exitUsage
	}
	a.report(err, codeOf(err))
	return exitFailed
}

// plainUsage takes the marks of a value's name out of the texts of flags, which only the help understands.
func plainUsage(cmd *cobra.Command) {
	plain := func(f *pflag.Flag) { f.Usage = strings.ReplaceAll(f.Usage, "`", "") }
	cmd.PersistentFlags().VisitAll(plain)
	cmd.Flags().VisitAll(plain)
	for _, sub := range cmd.Commands() {
		plainUsage(sub)
	}
}

// report says what went wrong, once for people and once for programs.
func (a *app) report(err error, code api.Code) {
	// An error may hold what somebody sent; it must not become two lines.
	text := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	fmt.Fprintf(a.stderr, "rootless-ovl: %s\n", text)
	if a.output.value != outputJSON || a.ownStdout {
		return
	}
	_ = a.printJSON(api.Error{Message: err.Error(), Code: code}) // when this fails too, standard error has it
}

// codeOf is the code of an error, whether it comes from the daemon or from here.
func codeOf(err error) api.Code {
	var e *api.Error
	switch {
	case errors.As(err, &e):
		return e.Code
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return api.CodeUnavailable
	case errors.Is(err, fs.ErrNotExist):
		return api.CodeNotFound
	case errors.Is(err, fs.ErrPermission):
		return api.CodeDenied
	}
	return api.CodeInternal
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "rootless-ovl",
		Short: "One flat network for containers on many hosts, with no root on any",
		Long: `rootless-ovl gives containers on many hosts one flat network, with no root on any host.

Run the daemon on every host with "up", then put containers on the network with "attach", or start a command on it
with "run".`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       thisBuild().Version, // has cobra look for --version
		Args: func(root *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			if near := root.SuggestionsFor(args[0]); len(near) > 0 {
				return usagef("%q is not a command: did you mean %s?", args[0], strings.Join(near, " or "))
			}
			return usagef("%q is not a command: `rootless-ovl --help` lists them", args[0])
		},
		RunE: func(root *cobra.Command, _ []string) error { return root.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.started = true
			return refuseEmpty(cmd)
		},
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	root.SetVersionTemplate(thisBuild().line())
	root.Flags().Bool("version", false, "show what this program was built from")
	root.SuggestionsMinimumDistance = 2
	flags := root.PersistentFlags()
	flags.VarP(&a.output, "output", "o", "print text for people or JSON for programs")
	flags.StringVar(&a.runtimeDir, "runtime-dir", "",
		"`directory` of the daemon's socket and subnet.env (default $XDG_RUNTIME_DIR/rootless-ovl; env "+envRuntimeDir+")")
	flags.StringVar(&a.stateDir, "state-dir", "",
		"`directory` of what outlives the daemon (default ~/.local/state/rootless-ovl; env "+envStateDir+")")
	mustComplete(root, "output", outputText, outputJSON)
	mustCompleteDir(root, "runtime-dir")
	mustCompleteDir(root, "state-dir")
	root.AddCommand(
		a.upCommand(), a.downCommand(), a.attachCommand(), a.detachCommand(), a.renameCommand(), a.runCommand(), a.execCommand(), a.forwardCommand(), a.psCommand(), a.publishCommand(), a.unpublishCommand(), a.addressesCommand(), a.statusCommand(), a.peersCommand(),
		a.configCommand(), a.dockerOptsCommand(), a.doctorCommand(), a.installCommand(), a.uninstallCommand(), a.versionCommand(),
	)
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			describeCompletion(cmd)
		}
	}
	return root
}

// completionFiles are where a user's shells look for completions.
var completionFiles = map[string]string{
	"bash":       "rootless-ovl completion bash > ~/.local/share/bash-completion/completions/rootless-ovl",
	"zsh":        "rootless-ovl completion zsh > ~/.zfunc/_rootless-ovl    # with ~/.zfunc in fpath",
	"fish":       "rootless-ovl completion fish > ~/.config/fish/completions/rootless-ovl.fish",
	"powershell": "rootless-ovl completion powershell | Out-String | Invoke-Expression",
}

// describeCompletion replaces cobra's texts, which name paths of other systems.
func describeCompletion(completion *cobra.Command) {
	completion.Short = "Print a script that completes commands in the shell"
	completion.Long = "Print a script with which the shell completes commands, flags and names of attachments."
	for _, shell := range completion.Commands() {
		shell.Short = "Print the script for " + shell.Name()
		shell.Long = fmt.Sprintf("Print the script with which %s completes commands, flags and names of attachments.", shell.Name())
		shell.Example = "  " + completionFiles[shell.Name()]
	}
}

// refuseEmpty refuses a flag that is given and empty, which an unset variable of a script makes of it: leaving it out means
// something else.
func refuseEmpty(cmd *cobra.Command) error {
	var err error
	cmd.Flags().Visit(func(f *pflag.Flag) {
		_, isIdle := f.Value.(*idleFlag)
		if text := f.Value.String(); err == nil && !isIdle && (text == "" || text == "[]") {
			err = usagef("--%s is empty: give it a value, or leave it out", f.Name)
		}
	})
	return err
}

// runtime is the runtime directory: flag, environment or default.
func (a *app) runtime() (string, error) {
	return directory(a.runtimeDir, envRuntimeDir, api.RuntimeDir)
}

// state is the state directory: flag, environment or default.
func (a *app) state() (string, error) {
	return directory(a.stateDir, envStateDir, api.StateDir)
}

func directory(flag, env string, byDefault func() (string, error)) (string, error) {
	if flag == "" {
		flag = os.Getenv(env)
	}
	if flag == "" {
		return byDefault()
	}
	return filepath.Abs(flag)
}

// client speaks to the daemon of this runtime directory.
func (a *app) client() (*api.Client, error) {
	dir, err := a.runtime()
	if err != nil {
		return nil, err
	}
	return api.NewClient(api.SocketPath(dir)), nil
}

// print writes v as JSON, or has text write it for people, as --output says.
func (a *app) print(v any, text func(io.Writer)) error {
	if a.output.value == outputJSON {
		return a.printJSON(v)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	text(w)
	return w.Flush()
}

func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// row writes one line of a table.
func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t") // a tabwriter keeps its error for Flush
		}
		if s := fmt.Sprint(c); s != "" {
			fmt.Fprint(w, s)
		} else {
			fmt.Fprint(w, "-")
		}
	}
	fmt.Fprint(w, "\n")
}

// ago is how long t lies back, in one or two units.
func (a *app) ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := max(a.now().Sub(t), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}

// choice is a flag that is one of a few words.
type choice struct {
	value string
	of    []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.of, "|") }

func (c *choice) Set(s string) error {
	for _, w := range c.of {
		if s == w {
			c.value = s
			return nil
		}
	}
	return fmt.Errorf("use %s", strings.Join(c.of, " or "))
}

// mustComplete offers words for a flag in the shell. The flag exists: anything else is a fault of this program.
func mustComplete(cmd *cobra.Command, flag string, words ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

func mustCompleteDir(cmd *cobra.Command, flag string) {
	err := cmd.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	})
	if err != nil {
		panic(err)
	}
}
