/* The two answers that namespaces cannot give: which kernel runs, and that this is no container.
 *
 * Preloaded into every program of a scenario (/etc/ld.so.preload). Built without a C library, so that one build
 * serves every tree.
 */
#define AT_FDCWD -100
#define SYS_OPEN 2
#define SYS_READ 0
#define SYS_CLOSE 3
#define SYS_UNAME 63
#define SYS_NEWFSTATAT 262
#define FIELD 65
/* PROC_PID_INIT_INO (include/linux/proc_ns.h): systemd takes every other pid namespace for a container's. */
#define FIRST_PID_NAMESPACE 0xEFFFFFFCul

extern int *__errno_location(void);

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long fourth __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

static int outcome(long result)
{
    if (result >= 0)
        return (int)result;
    *__errno_location() = (int)-result;
    return -1;
}

static int equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* struct stat on x86-64 begins with st_dev and st_ino, of eight bytes each. */
int stat(const char *path, unsigned long *info)
{
    int result = outcome(call(SYS_NEWFSTATAT, AT_FDCWD, (long)path, (long)info, 0));
    if (result == 0 && equal(path, "/proc/self/ns/pid"))
        info[1] = FIRST_PID_NAMESPACE;
    return result;
}

int stat64(const char *path, unsigned long *info)
{
    return stat(path, info);
}

/* struct utsname: sysname, nodename, release, …, each of FIELD bytes. */
int uname(char *names)
{
    int result = outcome(call(SYS_UNAME, (long)names, 0, 0, 0));
    long file = call(SYS_OPEN, (long)"/proc/sys/kernel/osrelease", 0, 0, 0);
    char *release = names + 2 * FIELD;
    if (result != 0 || file < 0)
        return result;
    long got = call(SYS_READ, file, (long)release, FIELD - 1, 0);
    release[got > 0 ? got : 0] = 0;
    for (char *end = release; *end; end++)
        if (*end == '\n')
            *end = 0;
    call(SYS_CLOSE, file, 0, 0, 0);
    return result;
}
