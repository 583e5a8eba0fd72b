// This file is the daemon's side: it starts the opener and asks it.

package opener

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/engine/docker"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// Config is what the opener is told at its start, and cannot be told later.
type Config struct {
	// Strict has the opener end if it cannot shut itself in.
	Strict bool
	// For the link with which dockerd finds the plugin: as dockerlink.Put.
	UserDir, Socket string
	// Ended is called once when the opener has ended before Close, with the reason, and need not return: what the daemon then sees of others is
	// nothing, which must not be taken for their end. Questions that are open are answered when it has returned.
	Ended func(error)
}

// findAge is how old what the opener knows of the machine's processes may be.
const findAge = time.Second

// Opener is the running process.
type Opener struct {
	conn  *net.UnixConn
	pid   int // constant after Start
	ended func(error)
	done  chan struct{} // closed when it has ended

	mu     sync.Mutex
	closed bool
	err    error // why it has ended; set before done is closed
	last   uint64
	asking map[uint64]chan reply
}

type reply struct {
	a answer
	f *os.File
}

// Start executes this program once more as an opener. main must call MaybeServe. Close ends it.
func Start(c Config) (*Opener, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("the opener: socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "the opener's pair")
	defer theirs.Close()
	conn, err := connOf(os.NewFile(uintptr(pair[0]), "pair"))
	if err != nil {
		return nil, fmt.Errorf("the opener: %w", err)
	}
	o := &Opener{conn: conn, ended: c.Ended, done: make(chan struct{}), asking: make(map[uint64]chan reply)}
	cmd := &exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{childArg0},
		Env:         environment(),
		Stderr:      os.Stderr,
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	started := make(chan error)
	go func() {
		// The "parent" that it dies with is a thread, so this one is kept until then (https://go.dev/issue/27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			o.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			o.attend(cmd)
		}
	}()
	if err := <-started; err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("the opener, a second process of this program: %w", err)
	}
	if err := send(conn, mandate{Strict: c.Strict, UserDir: c.UserDir, Socket: c.Socket, Age: findAge}, nil); err != nil {
		o.Close()
		return nil, fmt.Errorf("the opener: %w", err)
	}
	go o.receive()
	return o, nil
}

// environment is as little as the opener needs: Go's own settings, and none of what may be secret in ours.
func environment() []string {
	env := []string{} // nil would be all
	for _, name := range []string{"GODEBUG", "GOTRACEBACK", "GOCOVERDIR"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// attend waits for the end.
func (o *Opener) attend(cmd *exec.Cmd) {
	how := cmd.Wait()
	if how == nil {
		how = errors.New("it has ended by itself")
	}
	err := fmt.Errorf("the opener, the daemon's second process (pid %d), is gone: %w: start the daemon again", cmd.Process.Pid, how)
	o.mu.Lock()
	o.err = err
	closed := o.closed
	o.mu.Unlock()
	if !closed && o.ended != nil {
		o.ended(err)
	}
	close(o.done)
	_ = o.conn.Close() // a second time perhaps
}

// receive hands answers to those who wait for them.
func (o *Opener) receive() {
	buf := make([]byte, maxMessage)
	for {
		var a answer
		files, err := receive(o.conn, buf, &a)
		var netErr net.Error
		if err != nil && errors.As(err, &netErr) { // closed, or the opener has ended
			closeAll(files)
			_ = o.conn.Close()
			return
		}
		o.mu.Lock()
		waits := o.asking[a.ID]
		delete(o.asking, a.ID)
		o.mu.Unlock()
		if waits == nil || err != nil || len(files) > 1 {
			closeAll(files)
			files = nil
		}
		if waits == nil {
			continue
		}
		r := reply{a: a}
		if err != nil {
			r.a.Err = toRemote(err)
		}
		if len(files) == 1 {
			r.f = files[0]
		}
		waits <- r
	}
}

// ask asks one question. The file, which may be nil, is the caller's.
func (o *Opener) ask(call string, arg, value any) (*os.File, error) {
	b, err := json.Marshal(arg)
	if err != nil {
		return nil, err
	}
	waits := make(chan reply, 1)
	o.mu.Lock()
	o.last++
	id := o.last
	o.asking[id] = waits
	o.mu.Unlock()
	forget := func() {
		o.mu.Lock()
		delete(o.asking, id)
		o.mu.Unlock()
	}
	if err := send(o.conn, question{ID: id, Call: call, Arg: b}, nil); err != nil {
		forget()
		if errors.Is(err, unix.EMSGSIZE) {
			return nil, err
		}
		<-o.done // nothing else ends the pair
		return nil, o.Err()
	}
	var r reply
	select {
	case r = <-waits:
	case <-o.done:
		forget()
		return nil, o.Err()
	}
	if r.a.Err != nil {
		closeAll([]*os.File{r.f})
		return nil, r.a.Err
	}
	if value != nil {
		if err := json.Unmarshal(r.a.Value, value); err != nil {
			closeAll([]*os.File{r.f})
			return nil, fmt.Errorf("the opener's answer: %w", err)
		}
	}
	return r.f, nil
}

// Err is why the opener has ended; nil while it lives.
func (o *Opener) Err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// Close ends the opener, and returns when it is gone.
func (o *Opener) Close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	_ = o.conn.Close()
	<-o.done
}

// Use has nsutil and api look into other processes through the opener, everywhere in this program. It is called before anything uses them.
func (o *Opener) Use() {
	nsutil.SeeThrough(&nsutil.Sight{
		OpenNetns: o.openNetns,
		InodeAt: func(path string) (inode uint64, err error) {
			_, err = o.ask(callInodeAt, path, &inode)
			return inode, err
		},
		Find: func(inode uint64, last string) (path string, err error) {
			_, err = o.ask(callFind, findArg{inode, last}, &path)
			return path, err
		},
		Processes: func() (found map[uint64]int, err error) {
			_, err = o.ask(callProcesses, struct{}{}, &found)
			return found, err
		},
		DetachedNetns: func(pid int) (path string) {
			_, _ = o.ask(callDetached, pid, &path) // without an answer there is none
			return path
		},
		OfAnother: func(pid int) (is bool) {
			_, _ = o.ask(callOthers, pid, &is) // without an answer nothing is known
			return is
		},
	})
	api.SeePIDNamespaces(func(pid int) (name string, err error) {
		_, err = o.ask(callPIDNS, pid, &name)
		return name, err
	})
}

func (o *Opener) openNetns(path string) (*os.File, error) {
	f, err := o.ask(callOpenNetns, path, nil)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return nil, fmt.Errorf("%s: the opener has sent no descriptor: is the limit on open files (ulimit -n) reached?", path)
	}
	return f, nil
}

// Dockerd is what docker.Look says.
func (o *Opener) Dockerd(pid int) (d docker.Dockerd) {
	_, _ = o.ask(callDockerd, pid, &d) // without an answer nothing is known
	return d
}

// PutDockerLink is dockerlink.Put with what Start was told.
func (o *Opener) PutDockerLink() (pid int, made bool, err error) {
	var v linkValue
	if _, err := o.ask(callDockerLink, struct{}{}, &v); err != nil {
		return 0, false, err
	}
	if v.Err != "" {
		err = errors.New(v.Err)
	}
	return v.PID, v.Made, err
}
